"""Bringing in what a health system already has: FHIR bundles of patients, and a file on its clinics."""
