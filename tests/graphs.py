"""What takes the place of CUDA graphs on the CPU."""


class Again:
    """A graph that calls the function again: with the memory, and all that Python holds, of now."""

    def capture(self, body):
        self.replay = body

    def run_eagerly(self, body):
        body()
