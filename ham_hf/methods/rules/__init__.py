"""The methods that treat classes differently, one file each."""
