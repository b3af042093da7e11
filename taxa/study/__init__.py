"""The runs of a study: which to start, where they run, and the tables and pictures of their results."""
