"""`mpidl doctor`: what goes wrong on clusters, found before the first iteration and told with a line that mends it."""
