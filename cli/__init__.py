"""The command line of apecache."""
