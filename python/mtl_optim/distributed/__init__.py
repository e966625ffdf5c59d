"""How the rows of several ranks become one; so far one rank alone, and everything else is refused."""
