"""The control API over real UNIX sockets, and vhostctl as a program."""
