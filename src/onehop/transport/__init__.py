"""The engine: what the core decided is sent, what arrives is given to the core. The only importer of zmq."""
