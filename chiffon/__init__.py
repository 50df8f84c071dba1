"""chiffon: which of your machines can take a job right now, over RabbitMQ."""

__version__ = "0.1.0"
