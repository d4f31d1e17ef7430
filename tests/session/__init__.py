"""Tests of vhostd/session: messages in, actions and state out."""
