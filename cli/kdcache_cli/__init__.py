"""The `kdcache` command line: parse, call one library function, print."""
