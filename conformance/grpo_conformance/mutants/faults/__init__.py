"""The functions behind the table, by what they spoil. The first argument is what works."""
