"""The machine: files, memory, devices, the ranks of a distributed run, and `InputError`."""
