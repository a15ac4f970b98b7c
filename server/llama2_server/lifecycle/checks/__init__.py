"""Checks of the machine before torch is imported and the weights load: ports, stores, disk, memory, checkpoint."""
