package gateway

import (
	"fmt"
	"net/http"
)

// Code names one kind of error to clients. Codes are stable: clients branch on them.
type Code string

// The codes. docs/errors.md says what each means and what a client does about it.
const (
	InvalidToken          Code = "invalid_token"
	TokenExpired          Code = "token_expired"
	KeysUnavailable       Code = "keys_unavailable"
	Forbidden             Code = "forbidden"
	ClientMismatch        Code = "client_mismatch"
	SignatureInvalid      Code = "signature_invalid"
	SignatureExpired      Code = "signature_expired"
	UnknownCollection     Code = "unknown_collection"
	InvalidRequest        Code = "invalid_request"
	InvalidSince          Code = "invalid_since"
	InvalidLimit          Code = "invalid_limit"
	InvalidCursor         Code = "invalid_cursor"
	CursorExpired         Code = "cursor_expired"
	UnknownSession        Code = "unknown_session"
	SessionExpired        Code = "session_expired"
	InvalidLastUpdate     Code = "invalid_last_update"
	InvalidAttachmentID   Code = "invalid_attachment_id"
	DigestMismatch        Code = "digest_mismatch"
	AttachmentMissing     Code = "attachment_missing"
	AttachmentDeleted     Code = "attachment_deleted"
	AttachmentExists      Code = "attachment_exists"
	AttachmentTypeRefused Code = "attachment_type_refused"
	DirectUnavailable     Code = "direct_upload_unavailable"
	UploadGone            Code = "upload_gone"
	UploadOffset          Code = "upload_offset"
	UploadLocked          Code = "upload_locked"
	ChecksumMismatch      Code = "checksum_mismatch"
	TusVersion            Code = "unsupported_tus_version"
	PreconditionFailed    Code = "precondition_failed"
	RangeNotSatisfiable   Code = "range_not_satisfiable"
	QuotaExceeded         Code = "quota_exceeded"
	StoreUnavailable      Code = "store_unavailable"
	NotFound              Code = "not_found"
	MethodNotAllowed      Code = "method_not_allowed"
	RequestTimeout        Code = "request_timeout"
	AnswerTimeout         Code = "answer_timeout"
	RequestTooLarge       Code = "request_too_large"
	UnsupportedMediaType  Code = "unsupported_media_type"
	TooManyChanges        Code = "too_many_changes"
	ChangeIDReused        Code = "change_id_reused"
	UpgradeRequired       Code = "upgrade_required"
	ClientOutdated        Code = "client_outdated"
	TooManyScopes         Code = "too_many_scopes"
	RateLimited           Code = "rate_limited"
	TooManyConnections    Code = "too_many_connections"
	FrameTooLarge         Code = "frame_too_large"
	BinaryFrame           Code = "binary_frame"
	InvalidFrame          Code = "invalid_frame"
	SecondSubscribe       Code = "second_subscribe"
	SubscribeTimeout      Code = "subscribe_timeout"
	FullResyncRequired    Code = "full_resync_required"
	SlowReader            Code = "slow_reader"
	CollectionUnavailable Code = "collection_unavailable"
	LogUnavailable        Code = "log_unavailable"
	LogBehind             Code = "log_behind"
	SourceUnavailable     Code = "source_unavailable"
	NotReady              Code = "not_ready"
	ShuttingDown          Code = "shutting_down"
	Internal              Code = "internal"
)

// WireError is one row of the table of everything that clients can be told.
type WireError struct {
	Code      Code
	Status    int  // HTTP status; 0: never an HTTP answer
	Close     int  // WebSocket close code; 0: never closes a stream
	Retryable bool // whether the same request may succeed later
	Title     string
	Remedy    string // what the client does
}

// wireErrors is the one table of error codes, HTTP statuses, close codes and retry rules.
var wireErrors = []WireError{
	{InvalidToken, 401, 4401, false, "The token is missing or not valid", "Sign in again."},
	{TokenExpired, 401, 4402, false, "The token has expired", "Renew the token, then repeat the request or connect again."},
	{KeysUnavailable, 503, 4505, true, "The keys that tokens are verified with can't be fetched", "Wait for `Retry-After`, then repeat with the same token."},
	{Forbidden, 403, 4403, false, "The caller may not do this", "Do not repeat; ask for the role that the collection needs."},
	{ClientMismatch, 403, 4412, false, "The token is for another client", "Send the `client_id` that the token was issued for."},
	{SignatureInvalid, 403, 0, false, "The signature of the URL is not valid", "Ask for a new download URL; a URL also ends when the content is replaced."},
	{SignatureExpired, 403, 0, false, "The URL has expired", "Ask for a new download URL."},
	{UnknownCollection, 404, 4404, false, "There is no such collection for this caller", "Correct the names in `collections`."},
	{InvalidRequest, 400, 4400, false, "The request is malformed", "Correct what `errors` lists."},
	{InvalidSince, 400, 4406, false, "The position in since can't be read", "Send `last_seq` exactly as received, or resynchronise in full."},
	{InvalidLimit, 400, 0, false, "The limit is out of range", "Send a limit within the range that `detail` names."},
	{InvalidCursor, 400, 0, false, "The cursor can't be read", "Send `X-Sync-Cursor` exactly as received, or start the full resync anew."},
	{CursorExpired, 410, 0, false, "The full resync can't be continued", "Start the full resync anew, without a cursor."},
	{UnknownSession, 404, 0, false, "There is no such session: it was never opened, or the device has opened another since", "Open a session, then go on with its `sync_uuid`."},
	{SessionExpired, 410, 0, false, "The session can't be continued", "Open a session, then go on with its `sync_uuid`."},
	{InvalidLastUpdate, 400, 0, false, "last_update is no place in the change log", "Send the `last_seq` of the last page applied; where the session is older than a full resync, open another."},
	{InvalidAttachmentID, 400, 0, false, "The id of the attachment is not one", "Name attachments with 1 to 255 letters, digits, dots, underscores and hyphens, without two dots in a row and without escapes."},
	{DigestMismatch, 400, 0, true, "The bytes that arrived are not those that the digest is of", "Send the bytes again, with the digest of exactly these."},
	{AttachmentMissing, 404, 0, true, "A row names the attachment, but its bytes are not there yet", "Ask again when the manifest lists it as a download."},
	{AttachmentDeleted, 410, 0, false, "The attachment was deleted", "Delete the local copy; upload it anew if it is still wanted."},
	{AttachmentExists, 409, 0, false, "The id is taken", "Upload other bytes under another id; `detail` holds the digest of what is there for who may read it."},
	{AttachmentTypeRefused, 415, 0, false, "Attachments of this type are not taken", "Send one of the types that `detail` names, as Content-Type."},
	{DirectUnavailable, 409, 0, false, "Clients can't be sent to the blob store here", "Upload with `PUT /attachments/{id}` or through `/uploads`."},
	{UploadGone, 410, 0, false, "There is no such upload, or not any more", "Begin the upload anew."},
	{UploadOffset, 409, 0, false, "The upload is at another offset", "Ask with HEAD how far it has come, and go on from there."},
	{UploadLocked, 423, 0, true, "Another request works on the upload", "Ask with HEAD how far it has come, and go on from there."},
	{ChecksumMismatch, 460, 0, true, "The bytes are not those of the checksum; they were discarded", "Send them again."},
	{TusVersion, 412, 0, false, "The version of tus is not spoken here", "Send `Tus-Resumable: 1.0.0`."},
	{PreconditionFailed, 412, 0, false, "A condition of the request does not hold", "Read the present state, then decide anew."},
	{RangeNotSatisfiable, 416, 0, false, "The range is not one of this attachment", "Ask for one range within the size that `Content-Range` names."},
	{QuotaExceeded, 507, 0, false, "The caller's quota is used up", "Delete attachments that are not needed any more; `detail` says how much is left."},
	{StoreUnavailable, 503, 0, true, "The blob store can't be reached now", "Wait for `Retry-After`, then repeat."},
	{NotFound, 404, 0, false, "There is nothing at this address", "Correct the address."},
	{MethodNotAllowed, 405, 0, false, "The address does not take this method", "Use a method that `Allow` lists."},
	{RequestTimeout, 408, 0, true, "The request did not arrive in time", "Repeat the request."},
	{RequestTooLarge, 413, 0, false, "The request or its headers are too large", "Send less at once."},
	{UnsupportedMediaType, 415, 0, false, "The body is of another kind than the address takes", "Send JSON as `application/json`, without a content encoding."},
	{TooManyChanges, 422, 0, false, "The push has too many changes", "Send the changes in several pushes, in their order."},
	{ChangeIDReused, 409, 0, false, "A change_id came with another change before", "Give every change an id of its own; repeat a change exactly as it was sent."},
	{UpgradeRequired, 426, 0, false, "The address speaks WebSocket only", "Connect with a WebSocket client."},
	{ClientOutdated, 426, 4426, false, "The client is too old for this server", "Update the client."},
	{TooManyScopes, 403, 4413, false, "The token selects more scopes than one caller may have", "Ask for a token with fewer values in its claims."},
	{RateLimited, 429, 4429, true, "Too many requests", "Wait for `Retry-After`, then repeat."},
	{TooManyConnections, 429, 4430, true, "Too many open connections", "Close unused connections; wait for `Retry-After`, then connect again."},
	{FrameTooLarge, 0, 1009, false, "The frame is larger than the server reads", "Send smaller frames."},
	{BinaryFrame, 0, 1003, false, "The stream takes text frames only", "Send JSON in text frames."},
	{InvalidFrame, 0, 4407, false, "The frame is not a message that the stream knows", "Correct the frame; `detail` says what is wrong."},
	{SecondSubscribe, 0, 4409, false, "The stream is subscribed already", "Open another connection for another subscription."},
	{SubscribeTimeout, 0, 4408, true, "No subscribe frame came in time", "Connect again and subscribe at once."},
	{FullResyncRequired, 0, 4410, false, "The stream can't continue from this position", "Read `GET /sync/full` for the collections named, then subscribe from its position."},
	{SlowReader, 0, 4411, true, "The client did not read in time", "Connect again from the last position applied."},
	{CollectionUnavailable, 503, 4503, true, "The collection can't be served now", "Wait for `Retry-After`, then repeat."},
	{LogUnavailable, 503, 4504, true, "The change log can't be read now", "Wait for `Retry-After`, then repeat."},
	{LogBehind, 503, 4506, true, "The change log has not caught up with the source in time", "Wait for `Retry-After`, then repeat."},
	{SourceUnavailable, 503, 4507, true, "The source database can't be read now", "Wait for `Retry-After`, then repeat."},
	{AnswerTimeout, 503, 0, true, "The answer took longer than a request may", "Wait for `Retry-After`, then repeat; ask for less at once if it stays."},
	{NotReady, 503, 4508, true, "The server is starting", "Wait for `Retry-After`, then repeat."},
	{ShuttingDown, 503, 1001, true, "The server is stopping", "Connect again after the time that the server names."},
	{Internal, 500, 1011, true, "Something went wrong in the server", "Repeat a little later; report `request_id` if it stays."},
}

var wireErrorByCode = func() map[Code]*WireError {
	byCode := make(map[Code]*WireError, len(wireErrors))
	for i := range wireErrors {
		if byCode[wireErrors[i].Code] != nil {
			panic(fmt.Sprintf("gateway: the error %s is in the table twice", wireErrors[i].Code))
		}
		byCode[wireErrors[i].Code] = &wireErrors[i]
	}
	return byCode
}()

// Wire returns the code's row of the table; an unknown code is Internal, which tells clients nothing.
func (c Code) Wire() *WireError {
	if w := wireErrorByCode[c]; w != nil {
		return w
	}
	return wireErrorByCode[Internal]
}

// codeByStatus maps the errors of the HTTP framework, which know a status only.
func codeByStatus(status int) Code {
	switch status {
	case http.StatusNotFound:
		return NotFound
	case http.StatusMethodNotAllowed:
		return MethodNotAllowed
	case http.StatusRequestTimeout:
		return RequestTimeout
	case http.StatusRequestEntityTooLarge, http.StatusRequestHeaderFieldsTooLarge, http.StatusRequestURITooLong:
		return RequestTooLarge
	case http.StatusUnsupportedMediaType:
		return UnsupportedMediaType
	case http.StatusUpgradeRequired:
		return UpgradeRequired
	case http.StatusUnauthorized:
		return InvalidToken
	case http.StatusForbidden:
		return Forbidden
	case http.StatusServiceUnavailable:
		return NotReady
	}
	if status >= 400 && status < 500 {
		return InvalidRequest
	}
	return Internal
}
