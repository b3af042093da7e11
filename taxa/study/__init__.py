"""The runs of a study: which to start, where they run, and tables and pictures of their results."""
