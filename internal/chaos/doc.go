// Package chaos is the fault harness: a fleet of three gateways with PostgreSQL, Redis and a load balancer, an application
// and clients at work on it, and faults that follow from a seed. When the faults are over, every client must hold what SELECT
// returns under its policy, and every answer that it got must have been true.
//
// It owns all the processes, relays and files of a run, and touches no server that it didn't start. A Stack serves one run at
// a time; several stacks run side by side.
package chaos
