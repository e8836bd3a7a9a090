package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"image"
	"image/color"
	"image/png"
	"io"
	mathrand "math/rand/v2"
	"net/http"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

// demoPhotoPause is the time between two photos of Ben's camera.
const demoPhotoPause = 10 * time.Second

// camera is Ben's: now and then it adds a photo to a todo of his and Ana's team. What it can't do is told, and stops nothing
// else.
func (d *demo) camera(ctx context.Context, base string) error {
	select {
	case <-ctx.Done():
		return nil
	case <-d.guided:
	}
	if d.rate <= 0 {
		return nil
	}
	app, err := pgx.Connect(ctx, d.database)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer app.Close(context.WithoutCancel(ctx))
	for ; ctx.Err() == nil; demoPause(ctx, demoPhotoPause) {
		if err := d.photograph(ctx, app, base); err != nil && ctx.Err() == nil {
			d.tell("Ben's camera: %v", err)
		}
	}
	return nil
}

func demoPause(ctx context.Context, pause time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(pause):
	}
}

// photograph uploads a picture, and then pushes the row that names it: until then nobody else learns of it.
func (d *demo) photograph(ctx context.Context, app *pgx.Conn, base string) error {
	token, err := d.bensToken()
	if err != nil {
		return err
	}
	var todo string
	err = app.QueryRow(ctx, `SELECT id FROM todos WHERE team_id = $1 AND photo_id IS NULL ORDER BY random() LIMIT 1`, demoDesign).Scan(&todo)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil
	}
	if err != nil {
		return err
	}
	photo := strings.ToLower(rand.Text()) + ".png"
	picture, err := demoPicture()
	if err != nil {
		return err
	}
	if err := demoUpload(ctx, base, token, photo, picture); err != nil {
		return err
	}
	answer, err := demoPush(ctx, base, token, []demoChange{{ChangeID: photo, Collection: "todos", Operation: "update", DocID: todo, Data: map[string]any{"photo_id": photo}}})
	if err == nil && len(answer.Results) == 1 && answer.Results[0].Code != "" && answer.Results[0].Code != "not_found" { // deleted meanwhile
		err = errors.New(answer.Results[0].Error)
	}
	return err
}

// demoPicture is a photo of the evening sky, more or less.
func demoPicture() ([]byte, error) {
	const width, height = 320, 200
	picture := image.NewRGBA(image.Rect(0, 0, width, height))
	hue := mathrand.IntN(100)
	for y := range height {
		for x := range width {
			picture.Set(x, y, color.RGBA{uint8(255 - y/2 - hue/2), uint8(60 + y/2 + x%7), uint8(100 + hue - y/4), 255})
		}
	}
	var out bytes.Buffer
	err := png.Encode(&out, picture)
	return out.Bytes(), err
}

// demoUpload puts a file under an id.
func demoUpload(ctx context.Context, base, token, id string, content []byte) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, base+"/attachments/"+id+"?client_id="+demoTablet, bytes.NewReader(content))
	if err != nil {
		return err
	}
	request.Header.Set("Authorization", "Bearer "+token)
	request.Header.Set("Content-Type", "image/png")
	response, err := demoClient().Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if response.StatusCode/100 != 2 {
		const most = 1000
		text, _ := io.ReadAll(io.LimitReader(response.Body, most)) // Half a problem is better than none.
		return fmt.Errorf("PUT %s: %s: %s", request.URL, response.Status, text)
	}
	return nil
}

// demoDownload fetches a file and returns its size.
func demoDownload(ctx context.Context, base, token, id string) (size int64, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/attachments/"+id, nil)
	if err != nil {
		return 0, err
	}
	request.Header.Set("Authorization", "Bearer "+token)
	response, err := demoClient().Do(request)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return 0, fmt.Errorf("GET %s: %s", request.URL, response.Status)
	}
	return io.Copy(io.Discard, response.Body)
}

func demoClient() *http.Client {
	return &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: demoAnswerLimit}
}

// showFile does what the manifest's operations ask of Ana's client, and prints it.
func (d *demo) showFile(ctx context.Context, base, token string, frame demoFrame, arrived time.Time) {
	if frame.Operation == "delete" {
		d.tell("%s  file    delete    %s", arrived.Format("15:04:05.000"), frame.AttachmentID)
		return
	}
	size, err := demoDownload(ctx, base, token, frame.AttachmentID)
	if err != nil {
		d.tell("%s  file    %v", arrived.Format("15:04:05.000"), err) // Gone by now: a delete follows.
		return
	}
	d.tell("%s  file    download  %s, %d bytes", arrived.Format("15:04:05.000"), frame.AttachmentID, size)
}
