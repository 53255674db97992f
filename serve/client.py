"""A control loop for openvla-serve that never waits for an answer to take the next picture."""
import base64, json, sys, threading, time, urllib.error, urllib.request

URL, INSTRUCTION, HZ, DEADLINE_MS = "http://127.0.0.1:8000/v1/act", "put eggplant into pot", 5, 1000
NAME = f"arm-{time.time():.0f}"  # a program that begins anew is a new client
newest, lock = -1, threading.Lock()


def step(seq, picture):
    global newest
    body = json.dumps({"image": base64.b64encode(picture).decode(), "instruction": INSTRUCTION})
    headers = {"Content-Type": "application/json", "X-Client-Id": NAME, "X-Seq": str(seq),
               "X-Timestamp": str(time.time()), "X-Deadline-Ms": str(DEADLINE_MS)}
    try:
        request = urllib.request.Request(URL, body.encode(), headers)
        answer = json.load(urllib.request.urlopen(request, timeout=DEADLINE_MS / 1000 + 2))
    except urllib.error.HTTPError as error:
        return print(seq, json.load(error)["code"])  # superseded, deadline_exceeded, ...
    with lock:  # a motion of an older picture never follows one of a newer picture
        if seq > newest:
            newest = seq
            print(seq, [round(x, 4) for x in answer["action"]])  # robot.move_by(answer["action"])


for seq in range(int(sys.argv[2]) if len(sys.argv) > 2 else 50):
    with open(sys.argv[1], "rb") as file:  # camera.read()
        threading.Thread(target=step, args=(seq, file.read())).start()
    time.sleep(1 / HZ)
