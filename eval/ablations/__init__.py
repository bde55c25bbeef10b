"""The paper's ablations, trained and compared with seeds."""
