"""What a job needs on hardware that is not there: memory, time and money.

  config + topology -> compiled programs -> counts -> roofline -> report

The programs are those that the job runs, compiled ahead of time.
"""
