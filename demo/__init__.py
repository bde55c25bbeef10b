"""`vqrae demo`: a page on which people try what was trained."""
