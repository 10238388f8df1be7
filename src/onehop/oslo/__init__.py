"""The driver for oslo.messaging: ``transport_url = zmq://``."""
