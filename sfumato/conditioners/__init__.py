"""What a user supplies -> what a network is told: text, labels, pictures."""
