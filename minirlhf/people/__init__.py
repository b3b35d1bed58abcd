"""A person as the judge of answers."""
