"""What any script needs of the machine: command line, files, progress, processes, precision, signals."""
