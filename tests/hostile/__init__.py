"""What a hostile guest or a broken VMM can send, thrown at the real program as a process.

The numbers H1..H97 name the inputs of the threat model; each attack states its verdict. Must not
import vhostd: the program is seen through its socket, its eventfds, guest memory and /proc only.
"""
