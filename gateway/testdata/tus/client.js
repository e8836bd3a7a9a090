// Drives tus-js-client against a gateway: one command a line on stdin, one answer in JSON a line on stdout.
// Environment: ENDPOINT, TOKEN. The client is the package as published; nothing of it is replaced.
'use strict'
const fs = require('node:fs')
const readline = require('node:readline')
const { PassThrough } = require('node:stream')
const tus = require('tus-js-client')

const headers = { Authorization: `Bearer ${process.env.TOKEN}` }
let abort = null // ends the upload under way

// upload sends a file.
function upload({ file, metadata, resume, chunk, withCreation, deferred, retryDelays }) {
  return new Promise((resolve) => {
    const requests = []
    let retries = 0
    const options = {
      endpoint: process.env.ENDPOINT, headers, metadata, chunkSize: chunk || Infinity,
      retryDelays: retryDelays || null, uploadDataDuringCreation: Boolean(withCreation), uploadLengthDeferred: Boolean(deferred), removeFingerprintOnSuccess: true,
      onShouldRetry: (err, attempt) => { retries = attempt + 1; return true },
      onAfterResponse: (req, res) => { requests.push(`${req.getMethod()} ${res.getStatus()}`) },
      onError: (err) => resolve({ error: String(err), status: err.originalResponse ? err.originalResponse.getStatus() : 0, requests, retries }),
      onSuccess: () => resolve({ url: u.url, requests, retries }),
    }
    if (resume) options.uploadUrl = resume
    const bytes = fs.createReadStream(file)
    // A stream whose length nobody knows: of a file, the client would take its chunk size for the length of the last one.
    const u = new tus.Upload(deferred ? bytes.pipe(new PassThrough()) : bytes, options)
    abort = (terminate) => u.abort(terminate).then(() => resolve({ aborted: true, url: u.url, requests }), (err) => resolve({ error: String(err), requests }))
    u.start()
  })
}

const commands = {
  upload,
  abort: ({ terminate }) => { abort(terminate) }, // answered as the upload; as an app that is closed does, or one that gives up
  terminate: ({ at }) => tus.Upload.terminate(at, { headers }).then(() => ({ terminated: true }), (err) => ({ error: String(err) })),
}

readline.createInterface({ input: process.stdin }).on('line', async (line) => {
  const { command, ...rest } = JSON.parse(line)
  const answer = await commands[command](rest)
  if (answer) process.stdout.write(JSON.stringify(answer) + '\n')
})
