"""Completion of the command line in bash, zsh and fish: quick answers from a tree of all commands that is kept in a file."""
