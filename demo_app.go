package main

import (
	"context"
	_ "embed"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/jackc/pgx/v5"
)

//go:embed demo_app.sql
var demoAppSQL string

// The people, the teams and Ana's list of demo_app.sql that the printed commands name.
const (
	demoAna       = "a0000000-0000-4000-8000-000000000001"
	demoBen       = "b0000000-0000-4000-8000-000000000002"
	demoDesign    = "70000000-0000-4000-8000-000000000001"
	demoKitchen   = "70000000-0000-4000-8000-000000000002"
	demoAnasInbox = "10000000-0000-4000-8000-000000000001"
)

// createDemoApp makes the application's database, tables and first rows, unless an earlier run on the same directory
// has done so. admin and app are connection strings to the maintenance database and to the application's.
func createDemoApp(ctx context.Context, admin, app string) error {
	if err := createDemoDatabase(ctx, admin); err != nil {
		return fmt.Errorf("create the demo's database: %w", err)
	}
	conn, err := pgx.Connect(ctx, app)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var exists bool
	if err := conn.QueryRow(ctx, "SELECT to_regclass('public.todos') IS NOT NULL").Scan(&exists); err != nil || exists {
		return err
	}
	// Without arguments all statements go in one message, and so in one transaction: all of the application or nothing.
	if _, err := conn.Exec(ctx, demoAppSQL); err != nil {
		return fmt.Errorf("create the demo's application: %w", err)
	}
	return nil
}

func createDemoDatabase(ctx context.Context, admin string) error {
	conn, err := pgx.Connect(ctx, admin)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var exists bool
	err = conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)", demoDatabase).Scan(&exists)
	if err != nil || exists {
		return err
	}
	_, err = conn.Exec(ctx, "CREATE DATABASE "+demoDatabase)
	return err
}

// demoAction is one thing that a user of the application does.
type demoAction struct {
	weight int
	sql    string
}

// demoActions are the application's statements. $1 is a text to use, and every statement takes it.
var demoActions = []demoAction{
	{30, `INSERT INTO todos (list_id, owner_id, team_id, title)
		SELECT id, owner_id, team_id, $1 FROM lists ORDER BY random() LIMIT 1`},
	{25, `UPDATE todos SET done = NOT done WHERE $1 <> '' AND id = (SELECT id FROM todos ORDER BY random() LIMIT 1)`},
	{10, `UPDATE todos SET title = $1 WHERE id = (SELECT id FROM todos ORDER BY random() LIMIT 1)`},
	{5, `UPDATE todos SET due = current_date + 3 WHERE $1 <> '' AND id = (SELECT id FROM todos ORDER BY random() LIMIT 1)`},
	// The file goes with its last reference, on every device and, some time later, in the store.
	{5, `UPDATE todos SET photo_id = NULL WHERE $1 <> '' AND id = (SELECT id FROM todos WHERE photo_id IS NOT NULL ORDER BY random() LIMIT 1)`},
	{15, `INSERT INTO comments (todo_id, author_id, body)
		SELECT id, owner_id, $1 || '?' FROM todos ORDER BY random() LIMIT 1`},
	// To another list, and so often to another owner or team: some clients see it go, others see it come.
	{8, `UPDATE todos SET (list_id, owner_id, team_id) =
			(SELECT id, owner_id, team_id FROM lists WHERE id <> todos.list_id ORDER BY random() LIMIT 1)
		WHERE $1 <> '' AND id = (SELECT id FROM todos ORDER BY random() LIMIT 1)`},
	{2, `UPDATE lists SET name = $1 WHERE id = (SELECT id FROM lists ORDER BY random() LIMIT 1)`},
	{8, `DELETE FROM comments WHERE $1 <> '' AND id = (SELECT id FROM comments ORDER BY random() LIMIT 1)`},
	{7, `DELETE FROM todos WHERE $1 <> '' AND id = (SELECT id FROM todos ORDER BY random() LIMIT 1)`},
}

// demoTrim holds the database at a few hundred rows, however long the demo runs.
const demoTrim = `DELETE FROM todos WHERE id IN (SELECT id FROM todos ORDER BY updated_at DESC OFFSET 200)`

var (
	demoVerbs = []string{"Order", "Paint", "Fix", "Sell", "Find", "Carry", "Clean", "Draw", "Cook", "Return"}
	demoNouns = []string{"the red chair", "two tickets", "the kitchen lamp", "a box of paper", "the garden gate",
		"Ben's camera", "the long report", "fresh basil", "the old map", "a better name"}
)

// demoWriter behaves like the application: rate statements a second, at random moments, until ctx ends.
func demoWriter(ctx context.Context, app string, rate float64) error {
	if rate <= 0 {
		<-ctx.Done()
		return nil
	}
	conn, err := pgx.Connect(ctx, app)
	if err != nil {
		if ctx.Err() != nil {
			return nil // told to end before it began
		}
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	timer := time.NewTimer(0)
	defer timer.Stop()
	for count := 1; ; count++ {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		err := demoWrite(ctx, conn, count)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("the demo's application: %w", err)
		}
		timer.Reset(time.Duration(rand.ExpFloat64() / rate * float64(time.Second)))
	}
}

// demoWrite does one random thing, and now and then removes the oldest rows.
func demoWrite(ctx context.Context, conn *pgx.Conn, count int) error {
	text := demoVerbs[rand.IntN(len(demoVerbs))] + " " + demoNouns[rand.IntN(len(demoNouns))]
	if _, err := conn.Exec(ctx, pickDemoAction(rand.IntN).sql, text); err != nil {
		return err
	}
	if count%50 != 0 {
		return nil
	}
	_, err := conn.Exec(ctx, demoTrim)
	return err
}

// pickDemoAction draws an action by its weight; intN draws from [0, n).
func pickDemoAction(intN func(n int) int) demoAction {
	total := 0
	for _, action := range demoActions {
		total += action.weight
	}
	draw := intN(total)
	for _, action := range demoActions {
		if draw -= action.weight; draw < 0 {
			return action
		}
	}
	return demoActions[0]
}
