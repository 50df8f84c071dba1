"""Writes ``definitions.json`` beside this file from the topology: ``make definitions``.

A broker that loads definitions when it first starts makes no default user, so the file has one.
Its password, ``chiffon``, is for a broker on a developer's machine; change it anywhere else:
``rabbitmqctl change_password chiffon``.
"""

import base64
import hashlib
import json
from pathlib import Path

from chiffon.contract.topology import definitions

VHOST = USER = "chiffon"
LOCAL_PASSWORD = "chiffon"


def password_hash(password: str, salt: bytes) -> str:
    """Return a hash as RabbitMQ keeps it: salted SHA-256 (rabbitmq.com, "Passwords")."""
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def main() -> None:
    """Write the file."""
    document = {
        "users": [
            {
                "name": USER,
                "password_hash": password_hash(LOCAL_PASSWORD, b"chif"),
                "hashing_algorithm": "rabbit_password_hashing_sha256",
                "tags": ["administrator"],
            }
        ],
        "permissions": [
            {"user": USER, "vhost": VHOST, "configure": ".*", "write": ".*", "read": ".*"}
        ],
        **definitions(VHOST),
    }
    path = Path(__file__).with_name("definitions.json")
    path.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
