"""The one door to adapters at rest: `door.Catalog`. The modules below it are its parts."""
