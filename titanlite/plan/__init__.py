"""What a configuration needs and how long it takes, without the devices."""
