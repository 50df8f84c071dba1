"""Everything on this machine: a private broker, a private database, and chiffon's processes.

``up`` puts it together; the tests use the same servers.
"""
