"""The feedback service: what patients say of their visits, and what must follow from it."""
