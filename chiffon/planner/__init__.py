"""The library of whoever asks for capacity: over AMQP, without a database."""
