"""What a coordinator makes of the sums that it is sent."""
