"""The other side of every contract, for tests: a vhost-user front end and a guest's drivers.

Written from the specifications with its own packing, so that a misunderstanding in the product
cannot hide behind the same one here. Must not import vhostd.
"""
