"""Class rules, one file each; each with the method of its name that trains with it."""
