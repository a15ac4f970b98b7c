"""The service that this repository ships, started for the kit with a made checkpoint and a dedicated card."""
