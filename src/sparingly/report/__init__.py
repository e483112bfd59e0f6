"""Ways of showing a result file: `terminal` (one screen), `html` (one page, opens offline), `readme` (tables)."""
