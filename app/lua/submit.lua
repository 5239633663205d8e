-- New tasks. KEYS[i] the snapshot of the i-th.
-- ARGV per task: org, id, event, rows, submission, body hash ('' without an idempotency key), number of words of what
-- it sets, and those: name and value in turn.
-- Answers per task an error, or {code, where it stands}. Codes: ok · duplicate (this very submission) · cached (same
-- idempotency key, same body) · mismatch · exists.
local function submit(at)
  local org, id, event, rows, submission, body_hash = unpack(ARGV, at, at + 5)
  local found = load(org, id)
  if found then
    local answer, first, first_hash, last = 'exists', more(org, id, 'submission', 'body_hash', 'last_event_id')
    if first == submission then
      answer = 'duplicate'
    elseif body_hash ~= '' and first_hash then
      answer = first_hash == body_hash and 'cached' or 'mismatch'
    end
    return { answer, found.last_seq, last, found.created_at, found.status, found.attempt }
  end
  -- A reused id goes on where the deleted task ended, so that an old cursor or fence can never mean a new thing.
  local grave = redis.call('HMGET', key('tombstone', org .. ':' .. id), 'last_seq', 'fence', 'submission', 'created_at')
  if submission ~= '' and grave[3] == submission then return { 'duplicate', grave[1], '', grave[4], 'gone', '0' } end
  local fields = {}
  if grave[1] then fields = { last_seq = grave[1], fence = grave[2] } end
  local plan = {
    org = org, id = id, fields = fields, change = row(rows, 'new'), type = 'submitted', event = event, n = '',
    sets = words_at(at + 6),
  }
  prepare(plan)
  write(plan)
  return done(plan)
end

return each(submit, 6)
