"""Device logic, pure: chains, config writes and operator wishes in, effects out.

Touches no guest memory, socket, clock or ring; backend/ performs the effects.
"""
