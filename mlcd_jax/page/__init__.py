"""report.html: one self-contained page of a run, gathered from its files."""
