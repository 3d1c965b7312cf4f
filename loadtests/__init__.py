"""Load tests: streams paced in real time, locust users and shapes, the SLO's gate, reports."""
