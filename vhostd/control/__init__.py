"""The control API and its client, vhostctl: verbs over HTTP on UNIX sockets.

Reads and changes VMs through the Daemon protocol only; must not know rings, messages or memory.
"""
