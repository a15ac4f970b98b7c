"""The HTTP API of the former host of the model: `HostedEndpointService`, called through a JSON gateway."""
