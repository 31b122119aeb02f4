"""What has to do with the machine: files, memory, devices, the ranks of a distributed run, and the error for invalid input."""
