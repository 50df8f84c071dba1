"""The broker: connections that are kept alive, publishing, consuming, declaring, dead letters."""
