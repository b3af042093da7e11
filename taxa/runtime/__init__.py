"""What any script needs of the machine: command line, files, processes, precision, signals."""
