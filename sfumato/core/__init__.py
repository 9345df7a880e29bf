"""Value types, configuration, randomness and pictures: what every other layer stands on."""
