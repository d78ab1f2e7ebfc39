"""What a configuration costs on machines you do not have, in closed form."""
