"""What level 4 asks of collectives: real processes, the questions that they answer, and the oracles."""
