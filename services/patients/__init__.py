"""The patients service: who is in care, who cares, and what is to be done."""
