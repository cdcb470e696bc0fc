"""The command line: `gossamer up | chat | adapters | train | keys | bench | doctor`."""
